"""`python -m cdt_lens.cli`, as `accelerate launch --module cdt_lens.cli` runs it."""

from cdt_lens.cli.app import main

if __name__ == "__main__":
    main()
