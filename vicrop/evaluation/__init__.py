"""ViCrop over whole datasets: runs, results, scores, and the page that shows them."""
