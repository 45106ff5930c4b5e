"""Runs compared: a table, curves and one HTML page, from the folders that runs leave behind."""
