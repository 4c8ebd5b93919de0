"""Records to pictures and tables: knows columns and colours, not how a value is measured.

Never imports torch or pyplot.
"""
