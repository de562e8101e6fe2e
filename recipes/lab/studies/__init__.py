"""Studies: several methods and seeds, trained and scored alike, and a report of them."""
