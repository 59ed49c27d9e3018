"""The command that prints the score table: see vicrop/evaluation/score_table.py.

python get_score.py --data_dir ./data/results
"""

from vicrop.evaluation.score_table import main

if __name__ == "__main__":
    main()
