"""Benchmarks as they are released, made into data.json: see vicrop/prepare/releases.py."""

from vicrop.prepare.releases import main

if __name__ == "__main__":
    main()
