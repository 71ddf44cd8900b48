"""Pages and tables that are made from run folders; nothing here needs a device."""
