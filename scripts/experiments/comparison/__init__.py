"""The comparison page: both frameworks train from the same weights, and one page shows what came of it."""
