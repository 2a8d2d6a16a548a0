"""`python -m stillnorm`, and with that `torchrun -m stillnorm`."""

from stillnorm.cli.main import main

if __name__ == "__main__":
    main()
