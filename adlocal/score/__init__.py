"""What traces are worth: doses, and how they are shown."""

from .trace_score import Score, TokenDose, score_trace

__all__ = ["Score", "TokenDose", "score_trace"]
