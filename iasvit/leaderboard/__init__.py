"""The leaderboard: tables, plots and page from rows and published values."""

from iasvit.leaderboard.write import write_leaderboard

__all__ = ["write_leaderboard"]
