"""`python -m cdt_lens.cli`, as `accelerate launch --module cdt_lens.cli` runs it."""

from cdt_lens.cli.interrupts import reported_interrupts


def main() -> None:
    """Run the command line; an interrupt of its imports is reported like a later one."""
    with reported_interrupts():
        from cdt_lens.cli.app import main as run

        run()


if __name__ == "__main__":
    main()
