"""What was found, in the forms people and programs read: results.json, report.md, report.html, junit.xml."""
