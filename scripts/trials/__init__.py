"""Trials: what the tests try for seconds, tried for as long as one likes, from a seed that repeats it.

    rounds    what a trial is given, and what it may say about itself
    playing   rounds in processes of their own, watched
    __main__  the command line

Every other module that has a function play() is a trial. It plays one round, and raises whatever it likes when
something is wrong:

    \"\"\"The line that `scripts/trial --list` shows.\"\"\"

    KINDS = ("small", "large")      # optional: round after round the next kind

    def play(this: Round) -> None:
        size = this.chosen.randrange(...)       # all chance comes from here
        image = this.folder / "image.qcow2"     # an empty directory, kept when the round fails
        this.count("bytes", size)               # optional: sums for the report

Beside those it may set ROUNDS (how many, unless the user says), SECONDS (after which a round is taken to hang) and
MEMORY (bytes of address space a round may use). What the tests have in their own modules is imported from there
(`tests` is on the path), never written twice.
"""
