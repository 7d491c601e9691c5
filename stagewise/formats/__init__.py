"""Files of any form to records, and records to messages. Imports no torch."""
