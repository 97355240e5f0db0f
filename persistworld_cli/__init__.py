"""persistworld: action-conditioned video world models of robots, post-trained and evaluated on own rollouts."""

__version__ = "0.1.0"
