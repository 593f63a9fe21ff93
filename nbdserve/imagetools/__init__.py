"""What image tools do, as plain synchronous functions: one module an operation; nothing here prints or parses.

The commands in cli/img are thin fronts of these functions.
"""
