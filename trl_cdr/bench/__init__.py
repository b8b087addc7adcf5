"""What scoring and a step of training cost, beside other ways to them. `trl-cdr bench` prints what this measures.

    workloads    which rows on which model: what can be asked for
    naive        the oracle: full rows, full logits, float32 log_softmax
    measure      seconds, peak memory, the machine's matrix rate
    run          one workload, measured; the table
    memory       a pair that stays on its device, or sleeps between calls
    pair_step    the step of a preference loss beside TRL's trainers
    adapter_pair a base and an adapter on it beside the same pair as two models

Not tests: nothing is asserted, because a machine's speed is no property of the code.
"""
