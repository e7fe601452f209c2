"""Several runs against each other: a grid of variants and seeds, its table, its statistics."""

EXAMPLE = """\
    recipe: embedded               # a name or a .yaml file
    seeds: [0, 1, 2, 3, 4]
    at_once: 2                     # runs at a time; they share the cores
    base: {run.iterations: 40, eval.every: 5}         # keys that every run changes
    variants:
      uniform: {credit.rule: uniform}                 # or {recipe: my.yaml, ...}
      stepwise: {credit.rule: stepwise}
    reference: uniform             # what others are paired with
    metric: reward
    reach: null                    # null: the reference's last median
    output_dir: runs/compare/first
"""
"""A grid file with all its keys."""
