# `just --list` shows these; each line can be run by hand as well.

# lint, format and types
lint:
    ruff check .
    ruff format --check .
    mypy

# the tests
test *ARGUMENTS:
    pytest {{ARGUMENTS}}

# longer versions of some tests
slow:
    pytest -m slow

# damaged and hostile input, for as long as one likes: `just fuzz 36000 7000000`
fuzz SECONDS="3600" FIRST="0":
    python -m tests.fuzz --seconds {{SECONDS}} --first {{FIRST}}

# a cache under writers, readers, clean-ups and kill -9
crash SECONDS="600":
    python -m tests.fuzz.crash {{SECONDS}}

# image files that ask for much: their time and memory
bombs:
    python -m tests.fuzz.bombs

# the page of all commands
docs:
    python docs/generate_commands.py
