"""The catalogue of known defects, a module a class."""
