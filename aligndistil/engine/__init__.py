"""Training on DeepSpeed, CPU included: the engine, the process group, checkpoints and the chunked token terms."""
