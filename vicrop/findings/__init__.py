"""The ViCrop paper's findings, on any model and any dataset with `gt_bbox`: a file for each."""
