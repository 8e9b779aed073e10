"""The plumbing that the labs of *Small Models, Open Experiments* share."""

__version__ = "0.1.0"
