"""The loop of RLHF: pairs of answers, judgements of people, a reward model, a policy, and again."""
