"""On-policy alignment: APA, with PPO and AWR beside it, on packed rollouts."""
