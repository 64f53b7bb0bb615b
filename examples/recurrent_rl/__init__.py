"""Recurrent reinforcement learning: sb3-contrib's RecurrentPPO and TorchRL's modules on layers with resets."""
