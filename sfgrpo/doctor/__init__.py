"""`sfgrpo doctor`: will it run here, will it fit, what does an iteration take.

examination   the report: sections, problems, and what to do about them
machine       environment, devices, processes, disk
selfcheck     every op against its reference, on every device
variants      a recipe's memory as it asks for it, and at other stages
memory        what a rank holds at each ZeRO stage, as arithmetic
host          what a node's main memory has to hold
footprint     what a network's work needs, measured without weights
twins         what an iteration takes, beside the same recipe with uniform credit
advice        settings that run, and are known to disappoint
rewards       whether what the rewards load is here
skeleton      a recipe's pipeline on no device
published     configurations of models that are known by their hub id
"""
