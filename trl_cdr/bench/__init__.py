"""What scoring costs, beside the naive and the padded way, in one run. `trl-cdr bench` prints what this measures.

    workloads    which rows on which model: what can be asked for
    naive        the oracle: full rows, full logits, float32 log_softmax
    measure      seconds, peak memory, the machine's matrix rate
    run          one workload, measured; the table

Not tests: nothing is asserted, because a machine's speed is no property of the code.
"""
