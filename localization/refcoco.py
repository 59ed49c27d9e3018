"""RefCOCO as samples for the pipeline: see vicrop/localization/refcoco.py."""

from vicrop.localization.refcoco import main

if __name__ == "__main__":
    main()
