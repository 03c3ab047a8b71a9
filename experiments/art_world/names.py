"""What the art world knows: things that all artists drew, as emoji-datasource names them, and what people call them."""

from __future__ import annotations

# Short name in emoji-datasource -> what a caption calls it, where that is not the short name itself.
_CALLED = {
    "8ball": "billiard ball", "game_die": "dice", "sunny": "sun", "hotdog": "hot dog", "meat_on_bone": "meat",
    "poultry_leg": "chicken leg", "cheese_wedge": "cheese", "hot_pepper": "chili", "bell_pepper": "pepper",
    "evergreen_tree": "pine", "four_leaf_clover": "clover", "icecream": "ice cream cone",
    "chocolate_bar": "chocolate", "birthday": "birthday cake", "wine_glass": "glass of wine", "beer": "glass of beer",
    "coffee": "cup of coffee", "jack_o_lantern": "carved pumpkin", "tophat": "top hat", "eyeglasses": "glasses",
    "athletic_shoe": "sneaker", "billed_cap": "cap", "musical_keyboard": "piano", "drum_with_drumsticks": "drum",
    "bulb": "light bulb", "tv": "television", "mag": "magnifying glass", "tennis": "tennis ball",
    "football": "american football", "soccer": "soccer ball", "art": "palette", "racing_motorcycle": "motorcycle",
    "fire_engine": "fire truck", "bike": "bicycle", "octagonal_sign": "stop sign", "european_castle": "castle",
    "bow_and_arrow": "bow", "carpentry_saw": "saw", "cat2": "cat", "dog2": "dog", "pig2": "pig", "cow2": "cow",
    "tiger2": "tiger", "rabbit2": "rabbit", "mouse2": "mouse", "dromedary_camel": "camel", "panda_face": "panda",
    "lion_face": "lion", "fox_face": "fox", "giraffe_face": "giraffe", "zebra_face": "zebra",
    "unicorn_face": "unicorn", "sauropod": "long neck dinosaur", "t-rex": "tyrannosaurus", "whale2": "whale",
    "lock": "padlock", "computer": "laptop", "three_button_mouse": "computer mouse", "electric_plug": "plug",
    "pencil2": "pencil", "straight_ruler": "ruler", "boat": "sailing boat", "couch_and_lamp": "couch",
    "shopping_trolley": "shopping cart", "house_with_garden": "house",
}  # fmt: skip

# A hundred things that everybody knows: what tests of the whole world are made of.
_EVERYDAY = """
cat2 dog2 pig2 cow2 tiger2 rabbit2 mouse2 panda_face lion_face fox_face giraffe_face zebra_face elephant koala sheep
horse hedgehog snail ant bee ladybug spider butterfly crocodile snake turtle frog octopus fish crab penguin owl
flamingo duck rooster whale2 tomato grapes watermelon lemon banana pineapple apple pear cherries strawberry carrot
corn eggplant avocado broccoli mushroom hotdog hamburger pizza fries bread cheese_wedge cookie doughnut birthday
icecream popcorn coffee cactus evergreen_tree sunflower tulip rose basketball soccer baseball guitar trumpet violin
umbrella crown tophat jeans dress boot car bus taxi truck tractor bike airplane helicopter rocket boat key hammer
scissors bell balloon chair bed bulb camera
"""

_OTHERS = """
monkey dromedary_camel polar_bear unicorn_face bat gorilla rhinoceros kangaroo llama hippopotamus dragon sauropod
t-rex dolphin shark squid lobster tropical_fish shell jellyfish peacock kiwifruit coconut mango blueberries hot_pepper
cucumber potato onion bell_pepper peanuts taco croissant pancakes waffle bacon meat_on_bone poultry_leg fried_egg
sushi ramen spaghetti rice_ball candy lollipop cupcake chocolate_bar wine_glass cocktail beer glass_of_milk bubble_tea
teapot baby_bottle palm_tree four_leaf_clover maple_leaf potted_plant cherry_blossom christmas_tree jack_o_lantern
snowman fire sunny rainbow volcano tent ferris_wheel house_with_garden european_castle church ship canoe anchor
parachute flying_saucer steam_locomotive fire_engine racing_car racing_motorcycle motor_scooter skateboard
roller_skate traffic_light octagonal_sign teddy_bear game_die 8ball dart kite joystick video_game football tennis
ice_skate trophy saxophone musical_keyboard drum_with_drumsticks headphones tv computer printer three_button_mouse
floppy_disk electric_plug watch mag candle door bathtub couch_and_lamp bucket broom toothbrush shopping_trolley wrench
axe carpentry_saw screwdriver magnet shield bow_and_arrow bomb paperclip straight_ruler pencil2 books handbag
eyeglasses shirt athletic_shoe high_heel sandal socks gloves scarf coat billed_cap ring gem syringe pill stethoscope
microscope telescope lock art spoon ambulance alarm_clock
"""


def _things(words: str) -> dict[str, str]:
    return {short: _CALLED.get(short, short.replace("_", " ").replace("-", " ")) for short in words.split()}


EVERYDAY = _things(_EVERYDAY)
THINGS = EVERYDAY | _things(_OTHERS)  # emoji-datasource's short name -> what a caption says
NAMES = tuple(THINGS.values())
