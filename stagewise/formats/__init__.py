"""From files of any format to records, and from records to messages. Imports no torch."""
