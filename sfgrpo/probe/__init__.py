"""How good the credit signal of a recipe is, before a run.

Samples trajectories of the untrained policy once, and takes the clean estimates of their states by
every solver: how well do the advantages agree with those of the exact ODE, at what cost, and which
steps decide the final reward? No run folder is made or touched.
"""
