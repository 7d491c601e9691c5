"""PPO: rollouts, the policy, the reward model, schedules."""
