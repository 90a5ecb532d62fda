"""What people read: page, gallery, charts, tables, comparison, model card."""
