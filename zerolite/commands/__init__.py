"""Commands on files and machines: each file that `zerolite.cli` names has a `main(argv)`."""
