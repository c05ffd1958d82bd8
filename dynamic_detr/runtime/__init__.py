"""How the network runs: CUDA graphs, `torch.compile`, host–device copies, CPU threads."""
