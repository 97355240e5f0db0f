"""persistworld: action-conditioned video world models of robots, trained, post-trained and evaluated on their own rollouts."""

__version__ = "0.1.0"
