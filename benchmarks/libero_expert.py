"""How often the scripted expert of LIBERO succeeds, and in how many steps: a table, a row per task.

Every episode starts from a placement that the simulator samples for its seed (not from LIBERO's stored initial
states) and runs as the data maker runs it: noise is added to what is executed, never to the expert's state.

    python benchmarks/libero_expert.py --suites libero_object libero_goal --episodes 20
    python benchmarks/libero_expert.py --suites libero_10 --tasks 0 1 2
"""
