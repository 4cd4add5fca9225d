"""Programs that print tables beside other programs, and `demo_tower`, which pretrains the tower of the demo."""
