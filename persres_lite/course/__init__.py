"""What only the notebooks use: their start, explorers, figures, and checks of the exercises' answers."""

from persres_lite.support.notices import plainly

plainly()  # a lesson shows the package's remarks as sentences, without a file and a line
