"""What only the notebooks use: their start, explorers, figures, and checks of the exercises' answers."""
