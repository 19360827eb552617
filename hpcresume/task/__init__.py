"""One attempt of an array task: supervisor, driver and publisher, three processes."""
