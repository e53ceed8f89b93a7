# `just --list` shows these; each line can be run by hand as well.

# lint, format and types
lint:
    ruff check .
    ruff format --check .
    mypy

# the tests, all of them or as named: `just test -k cache`, `just test -m slow`
test *ARGUMENTS:
    pytest {{ARGUMENTS}}

# the page of all commands
docs:
    python docs/generate_commands.py

# what pruning saves, full against pruned: `just bench --shape llava-1.5-7b --layers 4`
bench *ARGUMENTS:
    gridprune bench {{ARGUMENTS}}

# the embedded model, anew: some hours; goes on where it was stopped
train FOLDER *ARGUMENTS:
    python -m training --out {{FOLDER}} {{ARGUMENTS}}

# damaged and hostile input, for as long as one likes: `just fuzz 36000 7000000`
fuzz SECONDS="3600" FIRST="0":
    python -m tests.fuzz --seconds {{SECONDS}} --first {{FIRST}}

# a cache under writers, readers, clean-ups and kill -9
crash SECONDS="600":
    python -m tests.fuzz.crash {{SECONDS}}

# image files that ask for much: their time and memory
bombs:
    python -m tests.fuzz.bombs
