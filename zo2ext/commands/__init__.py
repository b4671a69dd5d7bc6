"""The command line, one module per command. Invalid input raises a `zo2ext.errors.ZO2Error`."""
