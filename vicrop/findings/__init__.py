"""The papers' findings, on any model and any dataset with `gt_bbox`: each has a module of its own."""
