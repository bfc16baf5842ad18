"""SALT (Rawat et al., 2024, arXiv 2410.18779): the small model picks the data, teaches early, then
leaves.
"""

from megagrow.salt.cache import CacheSettings, cache_teacher
from megagrow.salt.cache_shards import samples_to_cache
from megagrow.salt.online import OnlineStream, score_candidates
from megagrow.salt.schedule import is_stage_one, teacher_weight, with_stage_one_steps
from megagrow.salt.score import ScoreSettings, score_corpus
from megagrow.salt.score_files import Scores, read_scores
from megagrow.salt.select import Selection, make_selection, select
from megagrow.salt.teacher import Teacher, check_teacher
from megagrow.salt.teacher_cache import TeacherCache

__all__ = [
    "CacheSettings",
    "OnlineStream",
    "ScoreSettings",
    "Scores",
    "Selection",
    "Teacher",
    "TeacherCache",
    "cache_teacher",
    "check_teacher",
    "is_stage_one",
    "make_selection",
    "read_scores",
    "samples_to_cache",
    "score_candidates",
    "score_corpus",
    "select",
    "teacher_weight",
    "with_stage_one_steps",
]
