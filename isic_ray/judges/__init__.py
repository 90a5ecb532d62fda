"""Who looks at pictures: which question for which picture, and the auditors."""
