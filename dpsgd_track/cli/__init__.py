"""The command line: every use of arguments, verb by verb."""
