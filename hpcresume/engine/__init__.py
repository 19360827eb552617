"""The streaming of sources through stages: chains, groups, pools of workers, the executor."""
