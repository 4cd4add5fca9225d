"""Programs that print tables; each runs its rival in the same process or beside it."""
