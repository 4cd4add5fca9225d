"""`lit-fast plan`: memory, time and price of a run before it starts."""
