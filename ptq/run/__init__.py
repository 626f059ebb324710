"""The main job: plan, walk, export, verify, evaluate, report."""
