"""Holds what the command line says and reads: help, options, YAML files, and one line for what is wrong in them."""
