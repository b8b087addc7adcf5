"""Prompts with five completions each, good and bad, short and long: a hundred preferences to compare two pairs on.

Written for this package; nothing is trained on them, and which completion is better is not said.
"""

ROWS: dict[str, tuple[str, str, str, str, str]] = {
    "Why does iron rust faster near the sea?": (
        "Salt from the spray dissolves in the film of water on the iron and makes it conduct better, so that the "
        "reaction with oxygen runs faster.",
        "Because of the salt in the air.",
        "The sea is blue and iron is grey, so they react.",
        "Iron does not rust near the sea at all; it only rusts in deserts.",
        "I cannot answer questions about metals.",
    ),
    "What is 17 times 6?": (
        "102.",
        "17 times 6 is 102, since 10 times 6 is 60 and 7 times 6 is 42.",
        "It is 96.",
        "17 times 6 is a product of two numbers, and products of numbers are found by multiplying them.",
        "Why do you want to know?",
    ),
    "Write one sentence about a lighthouse in winter.": (
        "Snow lay thick on the gallery, and still the lamp swept the black water every nine seconds.",
        "The lighthouse is a lighthouse in winter.",
        "In winter, lighthouses are cold. They are also tall. Ships see them.",
        "Summer is the best time to visit the beach with your family.",
        "A lighthouse stood in the snow and shone.",
    ),
    "My friend has not slept for three days and talks of giving up. What can I do?": (
        "Stay with your friend if you can, ask openly whether they think of ending their life, and call a crisis line "
        "or the emergency number together.",
        "Take it seriously: listen, and help them reach a doctor today.",
        "People say such things all the time, ignore it.",
        "Tell them to drink more coffee.",
        "I am sorry to hear that. Sleep is important for health and there are many articles on the subject.",
    ),
    "Name three causes of the fall in the number of bees.": (
        "Pesticides, parasites such as the varroa mite, and the loss of flowering meadows.",
        "1. Pesticides 2. Disease 3. Fewer flowers",
        "Bees, bees and bees.",
        "There is one cause: bees have moved to the cities, where the rents are lower.",
        "The decline of pollinators is multifactorial and it would be premature to name particular causes.",
    ),
    "How do I reverse a list in Python?": (
        "Call `items.reverse()` to change it in place, or take `items[::-1]` for a new one.",
        "Use list.sort(), which puts the largest element first and so reverses it.",
        "`reversed(items)` gives an iterator from the end; wrap it in `list(...)` for a list.",
        "Write a loop.",
        "Lists in Python are ordered collections that can hold values of any type, such as numbers and strings.",
    ),
    "Translate into French: The train leaves at noon.": (
        "Le train part à midi.",
        "Le train quitte midi.",
        "The train leaves at noon.",
        "Le train part à midi. (literally: the train departs at midday)",
        "Der Zug fährt um zwölf Uhr ab.",
    ),
    "Is it safe to look at the sun through dark glasses during an eclipse?": (
        "No. Ordinary dark glasses let through enough light to burn the retina; use certified eclipse glasses.",
        "Yes, if they are very dark.",
        "No.",
        "Eclipses happen when the moon passes between the sun and the earth, which is a beautiful thing to see.",
        "Only if you blink often, since blinking cools the eyes.",
    ),
    "Sum up in one line: the council voted 7 to 2 to keep the library open on Sundays.": (
        "The library stays open on Sundays, by a vote of 7 to 2.",
        "Two members of the council dislike books.",
        "A council met.",
        "The council voted on the library, and the result of the vote was 7 to 2, which concerns Sundays.",
        "The library will close on Sundays after a narrow vote.",
    ),
    "What should I cook with rice, eggs and spring onions?": (
        "Egg fried rice: fry the onions, add cold rice, push it aside, scramble the eggs and fold all together.",
        "Fried rice with egg.",
        "A chocolate cake.",
        "Boil the eggs for forty minutes in the onions, then throw away the rice.",
        "You could cook many things; rice is eaten by more than half of the people in the world.",
    ),
}
